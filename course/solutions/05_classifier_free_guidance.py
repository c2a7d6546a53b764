def composed(eps_null, eps_classes, weights, gamma):
    """ε̃ from ε_∅, all ε_k, their weights and γ."""
    differences = eps_classes - eps_null  # (K, n, c, h, w)
    return eps_null + gamma * (weights.reshape(-1, 1, 1, 1, 1) * differences).sum(dim=0)
