def guided_velocity(v, g, s, alpha_bar_t):
    """v̂ of v_θ, ∇ log f, s and ᾱ_t."""
    # ε̂ = ε − s √(1−ᾱ) g, so x̂_0 = x_0 + s (1−ᾱ)/√ᾱ g. In v the sum of both is −s √(1−ᾱ) (ᾱ + 1−ᾱ)/√ᾱ g.
    return v - s * ((1 - alpha_bar_t) / alpha_bar_t).sqrt() * g
