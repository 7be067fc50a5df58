"""The stochastic family of the paper, of which the ODE is the member without noise."""
