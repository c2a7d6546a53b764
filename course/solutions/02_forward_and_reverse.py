def posterior_mean(x_0, x_t, alpha_bar_t, alpha_bar_prev):
    """The mean of q(x_{t-1} | x_t, x_0)."""
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    of_x_0 = alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar_t)
    of_x_t = alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return of_x_0 * x_0 + of_x_t * x_t
