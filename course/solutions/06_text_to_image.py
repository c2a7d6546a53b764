def masked_attention(query, key, value, mask):
    """softmax(Q Kᵀ / √d) V over the tokens that count."""
    scores = query @ key.mT / query.shape[-1] ** 0.5  # (n, heads, l, m)
    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1) @ value
