"""Small models on an encoder's features: pooled rows [B, J, H], or every token's cells [B, L, J, H]."""
