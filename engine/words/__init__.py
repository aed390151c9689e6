"""Before pretrained encoders: static word vectors, and embeddings learned from nothing."""
