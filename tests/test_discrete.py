"""Discrete data: the family's marginals, its ends, sampling, the bound, and what is refused."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import discrete as study
from ddim_ode import NoiseSchedule, Status
from ddim_ode.diffusion import categorical, discrete
from ddim_ode.diffusion.categorical import Chain, divergence, draw, marginal, noised, one_hot, posterior, uniform
from ddim_ode.diffusion.discrete import DiscreteField, bound, cross_entropy, sample
from ddim_ode.models.discrete import DiscreteUNet, EmpiricalLogits

LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine()
#: A short schedule, every step of which is large.
SHORT = NoiseSchedule.from_alphas_cumprod([0.9, 0.7, 0.45, 0.2, 0.05])


def oracle(x_0, schedule=SHORT, classes=3):
    """A model that knows x_0: the generative process is then the inference chain q_σ(x_1 … x_T | x_0)."""
    return DiscreteField(lambda x, t: one_hot(x_0, classes).log(), schedule, classes, shape=x_0.shape[1:])


def pseudo(schedule=SHORT, classes=3, shape=(2,)):
    """A model without sense, that depends on every entry of x and on t."""

    def model(x, t):
        mixed = torch.cos(x.double() @ torch.arange(1.0, x.shape[1] ** 2 + 1).double().reshape(x.shape[1], -1))
        k = torch.arange(classes).double().reshape(-1, 1)
        return torch.sin((k + 1.0) * (mixed + 0.7 * t.double().reshape(-1, 1)).unsqueeze(1)) * 2.0

    return DiscreteField(model, schedule, classes, shape=shape)


def random_chain(schedule, random, most=8):
    """A chain on random times, its σ anywhere in their ranges, the ends often."""
    T = int(schedule.T)
    tau = np.sort(random.choice(T, random.integers(1, min(most, T) + 1), replace=False) + 1)
    share = random.choice([0.0, 1.0, *random.random(2)], tau.size)
    return Chain(schedule, tau, share * Chain(schedule, tau, np.zeros(tau.size)).largest)


def states_of(K, D):
    return torch.tensor(list(itertools.product(range(K), repeat=D)))


# -- the family ---------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 3), Fraction(1)])
@pytest.mark.parametrize("K", [2, 5])
def test_the_formula_in_fractions_and_ours(K, share):
    """The paper's posterior, with its own marginal put in, gives the earlier marginal; and ours is that posterior."""
    at, as_ = Fraction(3, 10), Fraction(4, 5)
    sigma = share * (1 - as_) / (1 - at)
    one = lambda k: [Fraction(int(i == k)) for i in range(K)]
    q_t = [at * e + (1 - at) / K for e in one(1)]
    total = [Fraction(0)] * K
    for x_t in range(K):
        pieces = zip(one(x_t), one(1), strict=True)
        q = [sigma * a + (as_ - sigma * at) * b + ((1 - as_) - (1 - at) * sigma) / K for a, b in pieces]
        assert all(v >= 0 for v in q)
        total = [s + q_t[x_t] * v for s, v in zip(total, q, strict=True)]
        x = torch.tensor([[x_t]])
        ours = posterior(one_hot(x, K), one_hot(torch.tensor([[1]]), K), float(at), float(as_), float(sigma))
        np.testing.assert_allclose(ours.flatten(), [float(v) for v in q], rtol=0, atol=2e-16)
    assert total == [as_ * e + (1 - as_) / K for e in one(1)]
    ours = marginal(one_hot(torch.tensor([[1]]), K), float(as_)).flatten()
    np.testing.assert_allclose(ours, [float(v) for v in total], rtol=0, atol=2e-16)


@pytest.mark.parametrize("schedule", [SHORT, LINEAR, COSINE], ids=["short", "linear", "cosine"])
def test_marginals_are_kept_by_every_admissible_chain(schedule):
    """D = 1: vectors of K numbers, at every time of random chains: given x_0, and drawn by the best predictor from data."""
    random = np.random.default_rng(0)
    for _ in range(30):
        chain, K = random_chain(schedule, random), int(random.integers(2, 6))
        np.testing.assert_allclose(chain.weights.sum(axis=1), 1.0, rtol=0, atol=1e-15)
        assert (chain.weights >= 0.0).all()
        clean = torch.from_numpy(random.dirichlet(np.full(K, 0.5))).reshape(1, K, 1)
        state = marginal(clean, chain.alphas[-1])
        p, states = clean.flatten(), states_of(K, 1)
        field = DiscreteField(EmpiricalLogits(states, schedule, K, p.numpy()), schedule, K)
        drawn = marginal(clean, chain.alphas[-1]).flatten()
        for i in reversed(range(chain.tau.size)):
            # The posterior is linear in both: a distribution of x_t in, that of x_s out.
            state = posterior(state, clean, chain.alphas[i + 1], chain.alphas[i], chain.sigmas[i])
            drawn = drawn @ study.transition(field, states, study.family(chain)[1], chain, i)
            exact = marginal(clean, chain.alphas[i]).flatten()
            assert float((state.flatten() - exact).abs().max()) < 1e-12
            assert float((drawn - exact).abs().max()) < 1e-12


def test_the_ends_of_the_range():
    chain = Chain.make(COSINE, 20)
    assert (chain.weights[:, 2] == 0.0).all()  # to the bit
    assert np.array_equal(chain.sigmas, chain.largest)
    assert (Chain.make(COSINE, 20, eta=1.0).weights[:, 0] == 0.0).all()
    half = Chain.make(COSINE, 20, eta=0.25)
    np.testing.assert_allclose(half.sigmas, 0.75 * (1 - half.alphas[:-1]) / (1 - half.alphas[1:]), rtol=1e-15)
    assert half.weights[0].tolist() == [0.0, 1.0, 0.0]
    over = chain.largest * (1.0 + 1e-13)  # rounding is no mistake
    assert np.array_equal(Chain(COSINE, chain.tau, over).sigmas, chain.largest)


def test_times_of_the_rules():
    assert Chain.make(LINEAR, 4).tau.tolist() == [250, 500, 750, 1000]
    assert Chain.make(LINEAR, 5, tau="quadratic").tau.tolist() == [40, 160, 360, 640, 1000]
    assert Chain.make(LINEAR).tau.size == 50
    chain = Chain.make(LINEAR, tau=[3, 9])
    assert chain.alphas.tolist() == [1.0, LINEAR.alphas_cumprod[2], LINEAR.alphas_cumprod[8]]


#: Of the tests below by chance: each statistic beyond its limit with probability 1e-7.
LIMIT = float(norm.isf(0.5e-7))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, None])
def test_the_chain_drawn_down_tau_has_the_marginals_and_the_joint(eta):
    """Monte Carlo: frequencies at each time, and of pairs at neighbouring times, all of one set of draws."""
    n, K = 20_000, 3
    x_0 = (torch.arange(n) % K).reshape(n, 1)
    chosen = {"sigmas": [0.0, 0.1, 0.3]} if eta is None else {"eta": eta}
    chain = Chain.make(SHORT, tau=[1, 2, 4], **chosen)
    latent = noised(x_0, chain.alphas[-1], K, seed=5)
    run = sample(oracle(x_0), latent, tau=[1, 2, 4], seed=6, trajectory=True, **chosen)
    assert torch.equal(run.x, x_0)  # the step to 0
    assert run.trajectory.shape == (4, n, 1)
    # By symmetry classes count from x_0.
    steps = [((x - x_0) % K).flatten() for x in run.trajectory]
    worst = 0.0

    def compare(found, p):
        nonlocal worst
        error = math.sqrt(p * (1.0 - p) / n)
        worst = max(
            worst, abs(float(found.double().mean()) - p) / error if error else 0.0 if not found.any() else np.inf
        )

    for i in range(3):
        alpha = chain.alphas[3 - i]
        for k in range(K):
            compare(steps[i] == k, alpha * (k == 0) + (1.0 - alpha) / K)
    for i in range(2):
        (alpha_s, alpha_t), sigma = chain.alphas[2 - i : 4 - i], chain.sigmas[2 - i]
        for a, b in itertools.product(range(K), repeat=2):
            q_t = alpha_t * (a == 0) + (1.0 - alpha_t) / K
            q = sigma * (a == b) + (alpha_s - sigma * alpha_t) * (b == 0) + (1 - alpha_s - (1 - alpha_t) * sigma) / K
            p = q_t * q
            compare((steps[i] == a) & (steps[i + 1] == b), 0.0 if p < 1e-15 else p)
    assert worst < LIMIT


def test_the_least_stochastic_member_stays_or_jumps_to_x_0():
    n, K = 500, 4
    x_0 = torch.randint(0, K, (n, 6), generator=torch.Generator().manual_seed(0))
    field = oracle(x_0, COSINE, K)
    path = sample(field, noised(x_0, 1e-3, K), steps=12, trajectory=True).trajectory
    before, after = path[:-1], path[1:]
    assert bool(((after == before) | (after == x_0)).all())
    assert bool((after == x_0)[before == x_0].all())
    assert bool((after != before).any(dim=(1, 2)).all())  # at every step some jump
    path = sample(field, noised(x_0, 1e-3, K), steps=12, eta=0.3, trajectory=True).trajectory
    assert not bool((path[1:] == x_0)[path[:-1] == x_0].all())


def test_a_class_without_probability_is_never_drawn():
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64).reshape(1, 5, 1).expand(4, 5, 1)
    u = torch.tensor([0.0, 0.3 - 1e-16, 0.5, 1.0 - 2.0**-53], dtype=torch.float64).reshape(4, 1)
    assert draw(p, u).flatten().tolist() == [1, 1, 3, 3]
    tenths = torch.tensor([0.1] * 10 + [0.0], dtype=torch.float64).reshape(1, 11, 1)  # whose sum, rounded, is below 1
    assert float(tenths.cumsum(1)[0, -1, 0]) == float(u[3]) < 1.0
    assert draw(tenths, u[3:]).item() == 9


def test_a_hundred_thousand_draws_have_their_distribution():
    n = 100_000
    x = noised(torch.full((1, n), 2), 0.6, 4, seed=9)
    for k, p in enumerate([0.1, 0.1, 0.7, 0.1]):
        assert abs(float((x == k).double().mean()) - p) < LIMIT * math.sqrt(p * (1 - p) / n)


# -- the generative process ---------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"eta": 0.3}, {"sigmas": [0.0, 0.05, 0.4]}, {"eta": 1.0}])
def test_a_run_is_the_formula_step_by_step(options):
    """Against numpy, with its own search of the class: labels, α, σ and draws each in their place."""
    asked = []
    inner = pseudo()

    def model(x, t):
        asked.append(t.clone())
        return inner.model(x, t)

    tau, seed, first, n = [2, 3, 5], 11, 7, 5
    field = DiscreteField(model, SHORT, 3, shape=(2,))
    run = sample(field, n=n, seed=seed, first=first, tau=tau, trajectory=True, **options)
    assert [t.tolist() for t in asked] == [[4] * n, [2] * n, [1] * n]
    assert all(t.dtype == torch.int64 for t in asked)
    assert (run.nfe, field.nfe, set(run.status)) == (3, 3, {Status.SUCCESS})
    table = {0: 1.0, 2: 0.7, 3: 0.45, 5: 0.05}
    like = torch.empty(0, 2)
    x = np.floor(uniform(like, range(7, 12), seed, 0).numpy() * 3).astype(int)
    assert np.array_equal(run.trajectory[0], x)
    for i, (t, s) in enumerate([(5, 3), (3, 2), (2, 0)]):
        most = (1 - table[s]) / (1 - table[t])
        sigma = options["sigmas"][2 - i] if "sigmas" in options else (1 - options["eta"]) * most
        f = torch.softmax(inner.model(torch.from_numpy(x), torch.full((n,), t - 1)), dim=1).numpy()
        u = uniform(like, range(7, 12), seed, t).numpy()
        new = np.empty_like(x)
        for b, d in itertools.product(range(n), range(2)):
            p = (table[s] - sigma * table[t]) * f[b, :, d] + ((1 - table[s]) - (1 - table[t]) * sigma) / 3
            p[x[b, d]] += sigma
            new[b, d] = np.searchsorted(np.cumsum(p), u[b, d], side="right")
        x = new
        assert np.array_equal(run.trajectory[i + 1], x)
    assert np.array_equal(run.x, x)


def test_batches_and_indices_change_nothing():
    field = pseudo()
    whole = sample(field, n=7, seed=3, steps=4, eta=0.5, trajectory=True)
    for size in (1, 3, 7, 100):
        parts = sample(field, n=7, seed=3, steps=4, eta=0.5, batch_size=size, trajectory=True)
        assert torch.equal(parts.trajectory, whole.trajectory)
    assert torch.equal(sample(field, n=3, seed=3, first=4, steps=4, eta=0.5).x, whole.x[4:])
    assert not torch.equal(sample(field, n=7, seed=4, steps=4, eta=0.5).x, whole.x)
    x_0 = whole.x
    terms = bound(field, x_0, steps=4, seed=2).terms
    assert torch.equal(bound(field, x_0, steps=4, seed=2, batch_size=2).terms, terms)
    assert torch.equal(bound(field, x_0[4:], steps=4, seed=2, first=4).terms, terms[:, 4:])
    assert not torch.equal(bound(field, x_0, steps=4, seed=3).terms, terms)
    assert torch.equal(noised(x_0[2:], 0.3, 3, seed=1, first=2), noised(x_0, 0.3, 3, seed=1)[2:])


def test_the_last_step_draws_or_takes_the_likeliest():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().reshape(1, 3, 1)
    field = DiscreteField(lambda x, t: logits.expand(x.shape[0], 3, x.shape[1]), SHORT, 3, shape=(4000,))
    assert set(sample(field, n=1, steps=2, last="argmax").x.flatten().tolist()) == {1}
    drawn = sample(field, n=1, steps=2).x
    for k, p in enumerate([0.2, 0.5, 0.3]):
        assert abs(float((drawn == k).double().mean()) - p) < LIMIT * math.sqrt(p * (1 - p) / 4000)


@pytest.fixture(scope="module")
def toy():
    """The study's toy, its field, and the total variation of what is drawn."""
    states, p = study.joint(3, 3)
    field = DiscreteField(EmpiricalLogits(states, COSINE, 3, p.numpy()), COSINE, 3, shape=(3,))
    single = lambda q: torch.einsum("n,nkd->kd", q, one_hot(states, 3))

    def errors(steps, name):
        drawn = study.propagate(field, states, *study.members(steps)[name])[-1]
        return float(0.5 * (drawn - p).abs().sum()), float((single(drawn) - single(p)).abs().max())

    return states, p, field, errors


def test_the_joint_converges_for_vanishing_noise_a_step_and_for_no_other(toy):
    """η = 0, and a rate of noise in time, at first order in 1/S; a fixed η > 0 stops at an error that grows with η."""
    errors = toy[3]
    for name in ("eta=0", "rate", "multinomial"):
        ratio = errors(200, name)[0] / errors(400, name)[0]
        assert 1.8 < ratio < 2.2, name
    floors = [errors(400, name)[0] for name in ("eta=0", "eta=0.2", "eta=0.5", "eta=1")]
    assert floors[0] < 0.002
    assert 0.005 < floors[1] < floors[2] < floors[3]
    assert errors(200, "eta=1")[0] / errors(400, "eta=1")[0] < 1.2


def test_one_dimensional_marginals_are_exact_for_one_step_only(toy):
    errors = toy[3]
    assert errors(1, "eta=0")[1] < 1e-6  # what α_T = 2e-9 tells of x_0
    assert 1e-3 < errors(5, "eta=0")[1] < 0.02
    assert errors(400, "eta=0")[1] < 5e-4
    assert errors(400, "eta=1")[1] > 5e-3


def test_samples_are_what_enumeration_says(toy):
    """The exact distribution of a coarse, noisy run, by the frequencies of all 27 states among 20,000 samples."""
    states, _, field, _ = toy
    n, chain = 20_000, Chain.make(COSINE, 4, eta=0.3)
    exact = study.propagate(field, states, *study.family(chain))[-1]
    x = sample(field, n=n, seed=1, steps=4, eta=0.3).x
    found = torch.bincount((x * torch.tensor([9, 3, 1])).sum(dim=1), minlength=27) / n
    assert float(((found - exact) / (exact * (1 - exact) / n).sqrt()).abs().max()) < LIMIT


def test_a_sample_that_fails_keeps_its_last_state_and_its_neighbours():
    inner = pseudo()

    def model(x, t):
        logits = inner.model(x, t)
        if int(t[0]) == 1:  # once: a later answer does not make it good
            logits[1, 2, 0] = math.nan
            logits[3] = -math.inf
        return logits

    options = {"seed": 1, "tau": [1, 2, 4, 5], "trajectory": True}
    good = sample(inner, n=5, **options)
    bad = sample(DiscreteField(model, SHORT, 3, shape=(2,)), n=5, **options)
    assert [s.name for s in bad.status] == ["SUCCESS", "NONFINITE", "SUCCESS", "NONFINITE", "SUCCESS"]
    assert torch.equal(bad.x[[0, 2, 4]], good.x[[0, 2, 4]])
    assert torch.equal(bad.x[[1, 3]], good.trajectory[2][[1, 3]])
    terms = bound(DiscreteField(model, SHORT, 3), good.x, steps=5).nats
    assert terms.isnan().tolist() == [False, True, False, True, False]


def test_nothing_waits_inside_the_loop():
    """Fake tensors have no values: any look at one fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.empty(3, device="cuda"), requires_grad=False)
        model = torch.nn.Module()
        model.weight = weight
        model.forward = lambda x, t: weight.reshape(1, 3, 1) * x.unsqueeze(1) * t.reshape(-1, 1, 1)
        field = DiscreteField(model, SHORT, 3, shape=(2,))
        latent = torch.empty((4, 2), dtype=torch.int64, device="cuda")
        for last in ("sample", "argmax"):
            run = sample(field, latent, steps=3, eta=0.5, last=last, batch_size=3, trajectory=True)
            assert run.x.device.type == run.trajectory.device.type == "cuda"
        assert sample(field, n=2, steps=2).x.shape == (2, 2)
        assert bound(field, latent, steps=3).nats.device.type == "cuda"
        assert bound(field, latent, steps=3).surrogate.shape == (3, 4)
        assert cross_entropy(field, latent, 3).shape == (4,)


# -- objectives ---------------------------------------------------------------------------------
def literal_bound(log_f, states, p, chain, K):
    """The bound by loops over x_0, x_t and dimensions, and nothing of ours but the field."""
    D, tau, a = states.shape[1], chain.tau.tolist(), chain.alphas.tolist()
    total = 0.0
    for n, x_0 in enumerate(states.tolist()):
        for d in range(D):
            q = [a[-1] * (k == x_0[d]) + (1 - a[-1]) / K for k in range(K)]
            total += float(p[n]) * sum(v * math.log(v * K) for v in q)
        for i, t in enumerate(tau):
            at, as_, sigma = a[i + 1], a[i], float(chain.sigmas[i])
            f = log_f(states, t).exp().tolist()
            for m, x_t in enumerate(states.tolist()):
                weight, kl = float(p[n]), 0.0
                for d in range(D):
                    weight *= at * (x_t[d] == x_0[d]) + (1 - at) / K
                    for k in range(K):
                        rest = sigma * (k == x_t[d]) + ((1 - as_) - (1 - at) * sigma) / K
                        jump = as_ - sigma * at
                        q, model = rest + jump * (k == x_0[d]), rest + jump * f[m][k][d]
                        kl += q * math.log(q / model) if q > 1e-15 else 0.0
                total += weight * kl
    return total


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"eta": 0.6}, {"sigmas": [0.0, 0.2]}])
def test_the_bound_is_what_enumeration_says(options):
    """The mean over 8,000 draws within 4 standard errors, and the study's exact one to rounding."""
    K, tau, states = 2, [2, 4], states_of(2, 2)
    p = torch.tensor([0.5, 0.1, 0.15, 0.25], dtype=torch.float64)
    field, chain = pseudo(classes=K), Chain.make(SHORT, tau=tau, **options)
    exact = literal_bound(field, states, p, chain, K)
    assert study.exact_bound(field, states, p, *study.family(chain)) == pytest.approx(exact, rel=1e-12)
    x_0 = states.repeat(2000, 1)
    found = bound(field, x_0, tau=tau, seed=1, **options)
    by_x_0 = found.nats.reshape(2000, 4)
    error = float((by_x_0.var(dim=0) / 2000 * p**2).sum().sqrt())
    assert float(by_x_0.mean(dim=0) @ p) == pytest.approx(exact, abs=4.0 * error)
    assert error < 0.01 * exact
    torch.testing.assert_close(found.bits, found.nats / (2 * math.log(2)))
    # It bounds the likelihood of what is drawn.
    drawn = study.propagate(field, states, *study.family(chain))[-1]
    assert exact > float(-(p * drawn.log()).sum())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_terms_are_not_negative_and_below_the_surrogate(eta):
    field = pseudo(LINEAR, 4, (5,))
    x_0 = torch.randint(0, 4, (50, 5), generator=torch.Generator().manual_seed(1))
    found = bound(field, x_0, steps=20, eta=eta)
    assert found.terms.shape == found.surrogate.shape == (20, 50)
    assert bool((found.terms >= 0.0).all())
    assert bool((found.terms <= found.surrogate * (1 + 1e-12)).all())
    assert float(found.terms.sum()) < 0.999 * float(found.surrogate.sum())
    assert torch.equal(found.terms[-1], found.surrogate[-1])
    assert torch.equal(found.terms[-1], found.cross_entropy[-1])
    assert float(found.prior[0]) == pytest.approx(5 * kl_to_uniform(found.chain.alphas[-1], 4), rel=1e-9)
    # Nothing is left where x_0 is known.
    assert not bound(oracle(x_0, LINEAR, 4), x_0, steps=20, eta=eta).terms.any()


def kl_to_uniform(alpha, K):
    q = [alpha + (1 - alpha) / K] + [(1 - alpha) / K] * (K - 1)
    return sum(v * math.log(v * K) for v in q)


def test_a_bound_from_below_the_last_time_counts_the_prior():
    field = pseudo()
    assert float(bound(field, torch.zeros(1, 2).long(), tau=[1, 2]).prior) == pytest.approx(2 * kl_to_uniform(0.7, 3))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_of_the_best_predictor_a_term_is_what_x_s_tells_of_x_0_beyond_x_t(eta):
    """D = 1: the expected term is the mutual information I(x_s; x_0 | x_t), not 0; what is 0 is the divergence of the mixed posterior."""
    K, p = 3, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    states, chain = states_of(K, 1), Chain.make(SHORT, tau=[2, 4], eta=eta)
    field = DiscreteField(EmpiricalLogits(states, SHORT, K, p.numpy()), SHORT, K)
    weights, alpha = chain.weights[1], chain.alphas[2]
    eye = torch.eye(K, dtype=torch.float64)
    q_t = alpha * eye + (1 - alpha) / K  # [x_0, x_t]
    known = weights[0] * eye.unsqueeze(0) + weights[1] * eye.unsqueeze(1) + weights[2] / K  # [x_0, x_t, x_s]
    joint = p.reshape(K, 1, 1) * q_t.unsqueeze(2) * known
    of_x_t = joint.sum(dim=(0, 2))
    mixed = joint.sum(dim=0) / of_x_t.unsqueeze(1)  # q(x_s | x_t)
    step = study.transition(field, states, study.family(chain)[1], chain, 1)
    assert float(divergence(mixed, step).sum(dim=1).max()) < 1e-15
    information = float((joint * (known.clamp(min=1e-300).log() - mixed.log())).sum())
    x_0 = states.repeat(4000, 1)
    terms = bound(field, x_0, tau=[2, 4], eta=eta).terms[0].reshape(4000, K)
    error = float((terms.var(dim=0) / 4000 * p**2).sum().sqrt())
    assert float(terms.mean(dim=0) @ p) == pytest.approx(information, abs=4 * error)
    assert information > 0.05
    # Any other predictor does worse by the mean divergence of its step.
    other = DiscreteField(lambda x, t: field.model(x, t) + torch.tensor([0.5, 0.0, 0.0]).reshape(1, 3, 1), SHORT, K)
    moved = study.transition(other, states, study.family(chain)[1], chain, 1)
    excess = float((joint * (known.clamp(min=1e-300).log() - moved.log())).sum()) - information
    assert excess == pytest.approx(float(of_x_t @ divergence(mixed, moved).sum(dim=1)), rel=1e-9)
    assert excess > 1e-3


def test_cross_entropy_is_that_of_the_drawn_state_and_has_its_gradient():
    seen = []
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    inner = pseudo()

    def model(x, t):
        seen.append((x.clone(), t.clone()))
        return scale * inner.model(x, t)

    x_0 = torch.randint(0, 3, (6, 2), generator=torch.Generator().manual_seed(2))
    t = torch.tensor([1, 2, 3, 4, 5, 5])
    loss = cross_entropy(DiscreteField(model, SHORT, 3), x_0, t, seed=4)
    ((x_t, label),) = seen
    assert label.tolist() == [0, 1, 2, 3, 4, 4]
    alphas = torch.tensor([0.9, 0.7, 0.45, 0.2, 0.05, 0.05], dtype=torch.float64)
    assert torch.equal(x_t, noised(x_0, alphas, 3, seed=4))
    log_f = inner.model(x_t, label).log_softmax(1)
    expected = [-sum(float(log_f[b, x_0[b, d], d]) for d in range(2)) for b in range(6)]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)
    loss.sum().backward()
    step = 1e-6
    ends = []
    for s in (1 - step, 1 + step):
        log_f = (s * inner.model(x_t, label)).log_softmax(1)
        ends.append(-float(log_f.gather(1, x_0.unsqueeze(1)).sum()))
    assert float(scale.grad) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-6)
    one = cross_entropy(DiscreteField(inner.model, SHORT, 3), x_0, 5, seed=4)
    torch.testing.assert_close(one[4:], loss[4:].detach())


# -- models -------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 5.0]])
def test_empirical_logits_are_bayes_rule(weights):
    K, data = 3, torch.tensor([[0, 1, 1], [2, 1, 0], [2, 2, 2], [0, 1, 0]])
    model, x, t = EmpiricalLogits(data, SHORT, K, weights), torch.tensor([[0, 1, 2], [2, 2, 1]]), torch.tensor([1, 3])
    found = model(x, t).softmax(1)
    for b, alpha in enumerate((0.7, 0.2)):
        mass = np.zeros((K, 3))
        for w, point in zip(weights or [1.0] * 4, data.tolist(), strict=True):
            for d in range(3):
                w *= alpha * (int(x[b, d]) == point[d]) + (1 - alpha) / K
            for d in range(3):
                mass[point[d], d] += w
        np.testing.assert_allclose(found[b], mass / mass.sum(axis=0), rtol=1e-12, atol=1e-15)


def test_the_network_starts_as_bayes_rule_for_independent_uniform_pixels():
    """Its last layer starts at 0: what is left is the likelihood of x_t, whose α is that of the label."""
    net = DiscreteUNet(3, SHORT, 2, resolution=4, width=8, multipliers=(1,), attention=(), groups=4)
    assert net.shape == (2, 4, 4)
    x = torch.randint(0, 3, (2, 2, 4, 4), generator=torch.Generator().manual_seed(3))
    found = net(x, torch.tensor([0, 4])).softmax(1)
    torch.testing.assert_close(
        found, marginal(one_hot(x, 3), torch.tensor([0.9, 0.05], dtype=torch.float64)), rtol=1e-12, atol=0.0
    )
    torch.nn.init.normal_(net.network.conv_out.weight)
    field = DiscreteField(net, SHORT, 3, shape=net.shape)
    assert bool((field(x, 2) != field(x, 3)).any())
    cross_entropy(field, x, 2).sum().backward()
    assert net.network.conv_in.weight.grad.abs().sum() > 0


def test_channels_and_classes_keep_their_places():
    """Logits (B, K, C, H, W): class k of channel c is what the U-Net puts into its channel k C + c."""
    net = DiscreteUNet(3, SHORT, 2, resolution=4, width=8, multipliers=(1,), attention=(), groups=4)
    with torch.no_grad():
        net.network.conv_out.bias.copy_(torch.arange(6.0))
    x = torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    context = net(x, torch.tensor([2])) - marginal(one_hot(x, 3), 0.45).log()
    for k, c in itertools.product(range(3), range(2)):
        torch.testing.assert_close(context[0, k, c], torch.full((4, 4), 2.0 * k + c, dtype=torch.float64))


def test_the_markovian_posterior_of_the_study_is_bayes_rule():
    K, at, as_ = 3, 0.3, 0.8
    f = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    eye = torch.eye(K, dtype=torch.float64)
    later, first = at / as_ * eye + (1 - at / as_) / K, as_ * eye + (1 - as_) / K  # [x_s, x_t], [x_0, x_s]
    for x_t in range(K):
        each = first * later[:, x_t]  # [x_0, x_s]
        expected = f @ (each / each.sum(dim=1, keepdim=True))
        found = study.product(one_hot(torch.tensor([[x_t]]), K), f.reshape(1, K, 1), at, as_).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("at", "as_"), [(0.3, 0.8), (0.1, 0.15), (0.6, 0.99)])
def test_the_markovian_posterior_is_a_member_for_two_classes_and_for_no_more(at, as_):
    sigma, largest = at / as_ * (1 - as_**2) / (1 - at**2), (1 - as_) / (1 - at)
    assert 0.0 < sigma < largest
    for K in (2, 3):
        x_0 = one_hot(torch.tensor([[0]]), K)
        apart = torch.zeros(1001)
        for k in range(K):
            x_t = one_hot(torch.tensor([[k]]), K)
            found = study.product(x_t, x_0, at, as_)
            shares = [sigma, *(largest * n / 1000 for n in range(1000))]
            each = [(posterior(x_t, x_0, at, as_, share) - found).abs().amax() for share in shares]
            apart = torch.maximum(apart, torch.stack(each))
        assert bool(apart[0] < 1e-14) == (K == 2)
        assert K == 2 or bool(apart.min() > 1e-3)


def test_rounding_leaves_no_step_out_of_its_range():
    least = Chain.make(COSINE, 5)
    for off in (-1.1e-16, 1.1e-16):  # about the one value that the step to t = 0 has, and about the other ends
        for sigmas in (least.sigmas + off, np.full(5, off)):
            chain = Chain(COSINE, least.tau, sigmas)
            assert chain.sigmas[0] == 0.0
            assert bool((chain.weights >= 0.0).all())
    with pytest.raises(ValueError, match=r"sigmas\[0\].* must lie in \[0, 0\].* outside by 1e-11"):
        Chain(COSINE, least.tau, np.full(5, 1e-11))


def test_each_name_has_one_home():
    assert set(categorical.__all__).isdisjoint(discrete.__all__)


# -- refusals -----------------------------------------------------------------------------------
X = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tau": [3, 2]}, r"tau must rise strictly, but tau\[0\] = 3 is followed by 2"),
        ({"tau": [2, 2]}, "tau must rise strictly"),
        ({"tau": [0, 2]}, "tau must lie in 1 to 5, but spans 0 to 2"),
        ({"tau": [2, 6]}, "tau must lie in 1 to 5, but spans 2 to 6"),
        ({"tau": [1.5, 2.0]}, "tau must be whole numbers"),
        ({"tau": []}, "tau must be whole numbers"),
        ({"tau": "cubic"}, 'tau must be "linear"'),
        ({"tau": [1, 2], "steps": 3}, "steps = 3 contradicts the 2 times"),
        ({"steps": 6}, "steps = 6 needs that many distinct times"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"eta": -0.1}, "eta must be a number from 0"),
        ({"eta": 1.1}, "eta must be a number from 0"),
        ({"eta": math.nan}, "eta must be a number from 0"),
        ({"eta": 0.5, "sigmas": [0.0]}, "give one of them"),
        ({"tau": [2, 4], "sigmas": [0.0]}, r"sigmas must be 2 numbers, one for each of tau, but their shape is \(1,\)"),
        (
            {"tau": [2, 4], "sigmas": [0.0, 0.5]},
            r"sigmas\[1\], of the step from t = 4 to 2, must lie in \[0, 0.375\].* is 0.5: outside by 0.125",
        ),
        ({"tau": [2, 4], "sigmas": [0.0, -0.25]}, r"sigmas\[1\].* is -0.25: outside by 0.25"),
        ({"tau": [2, 4], "sigmas": [0.1, 0.2]}, r"sigmas\[0\], of the step from t = 2 to 0, must lie in \[0, 0\]"),
        ({"tau": [2, 4], "sigmas": [0.0, math.nan]}, r"sigmas\[1\].* is nan"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**64}, r"seed must be below 2\*\*64"),
        ({"first": -1}, "first must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"x": X + 3}, r"must hold classes from 0 to 2, but \w+\[0, 0\] is 3"),
        ({"x": X - 1}, r"must hold classes from 0 to 2, but \w+\[0, 0\] is -1"),
        ({"x": X[:, :1]}, r"must have shape \(B, 2\) for this model, but got \(2, 1\)"),
        ({"x": X[0]}, r"must have shape \(B, \*d\)"),
        ({"x": X[:0]}, r"must have shape \(B, \*d\) with B >= 1"),
    ],
)
def test_what_cannot_be_is_refused_before_any_call(options, says):
    field = pseudo()
    x = options.get("x", X)
    options = {k: v for k, v in options.items() if k != "x"}
    with pytest.raises(ValueError, match=says):
        sample(field, x, **options)
    with pytest.raises(ValueError, match=says):
        bound(field, x, **options)
    assert field.nfe == 0


def test_more_refusals():
    field = pseudo()
    for wrong in (X.double(), X.bool(), X.numpy()):
        with pytest.raises(TypeError, match="latent must be a tensor of classes"):
            sample(field, wrong)
    with pytest.raises(ValueError, match="n = 3 contradicts the 2 latents"):
        sample(field, X, n=3)
    with pytest.raises(ValueError, match="sample needs latents"):
        sample(DiscreteField(field.model, SHORT, 3), n=3)
    with pytest.raises(ValueError, match='last must be "sample" or "argmax"'):
        sample(field, X, last="mean")
    with pytest.raises(ValueError, match="t must lie in 1 to 5, but spans 0 to 0"):
        cross_entropy(field, X, 0)
    with pytest.raises(ValueError, match="t must lie in 1 to 5, but spans 1 to 6"):
        cross_entropy(field, X, torch.tensor([1, 6]))
    for wrong in (1.0, True, torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="t must be a whole number"):
            cross_entropy(field, X, wrong)
    with pytest.raises(ValueError, match=r"x_0 must hold classes from 0 to 2, but x_0\[1, 0\] is 9"):
        cross_entropy(field, torch.tensor([[0, 1], [9, 1]]), 1)
    assert field.nfe == 0
    with pytest.raises(ValueError, match="discrete schedule"):
        DiscreteField(field.model, NoiseSchedule.edm(), 3)
    with pytest.raises(ValueError, match="discrete schedule"):
        Chain.make(NoiseSchedule.continuous(), 3)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        DiscreteField(field.model, SHORT.alphas_cumprod, 3)
    with pytest.raises(TypeError, match="model must be callable"):
        DiscreteField(None, SHORT, 3)
    with pytest.raises(ValueError, match="classes must be a whole number of at least 2"):
        DiscreteField(field.model, SHORT, 1)
    with pytest.raises(
        ValueError, match=r"must return logits \(B, K, \*d\), here \(2, 3, 2\), in floats, but returned \(2, 2\)"
    ):
        sample(DiscreteField(lambda x, t: x.double(), SHORT, 3), X)
    with pytest.raises(ValueError, match="in floats"):
        sample(DiscreteField(lambda x, t: torch.zeros(2, 3, 2).long(), SHORT, 3), X)


def test_what_is_no_distribution_is_refused_with_place_and_amount():
    good = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], dtype=torch.float64).unsqueeze(2)
    bad = good.clone()
    bad[1, 2, 0] += 0.25
    with pytest.raises(ValueError, match=r"x_0 must sum to 1 over its classes, but x_0\[1, :, 0\] is off by \+0.25"):
        posterior(good, bad, 0.3, 0.6, 0.1)
    with pytest.raises(ValueError, match=r"x_t must sum to 1 over its classes"):
        posterior(bad, good, 0.3, 0.6, 0.1)
    bad = good.clone()
    bad[0, 1, 0], bad[0, 2, 0] = -0.1, 0.9
    with pytest.raises(ValueError, match=r"x_0 must hold probabilities, but x_0\[0, 1, 0\] is -0.1"):
        marginal(bad, 0.5)
    bad[0, 1, 0] = math.nan
    with pytest.raises(ValueError, match=r"x_0\[0, 1, 0\] is nan"):
        marginal(bad, 0.5)
    with pytest.raises(TypeError, match="of classes, one_hot"):
        marginal(X, 0.5)
    with pytest.raises(ValueError, match=r"must have shape \(B, K, \*d\)"):
        marginal(torch.ones(2, 2) / 2, 0.5)
    with pytest.raises(ValueError, match="one shape"):
        posterior(good, good[:1], 0.3, 0.6, 0.1)
    for alphas in ((0.6, 0.3), (0.3, 0.3), (-0.1, 0.3), (0.3, 1.1)):
        with pytest.raises(ValueError, match="a step needs"):
            posterior(good, good, *alphas, 0.1)
    with pytest.raises(ValueError, match=r"sigma must lie in \[0, 0.5714285714\].* is 0.6: outside by 0.0286"):
        posterior(good, good, 0.3, 0.6, 0.6)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            noised(X, alpha, 3)
    with pytest.raises(ValueError, match=r"alpha must be one number or \(2,\)"):
        noised(X, torch.full((3,), 0.5), 3)
    with pytest.raises(ValueError, match="data must hold 0 to 2"):
        EmpiricalLogits(X + 3, SHORT, 3)
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        EmpiricalLogits(X, SHORT, 3, [1.0, -1.0])
    single = good.float()  # whose sums are rounded
    assert posterior(single, single, 0.3, 0.6, 0.1).dtype == torch.float64
