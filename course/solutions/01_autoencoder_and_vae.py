def kl_to_prior(mean, log_variance):
    """KL(q(z | x) ‖ N(0, I)), (n,)."""
    kl = 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance)  # of each dimension
    return kl.flatten(1).sum(dim=1)
