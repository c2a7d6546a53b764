def latent_variance(mean, std):
    """s² of z = μ + σ ε."""
    return (mean**2 + std**2).mean() - mean.mean() ** 2
