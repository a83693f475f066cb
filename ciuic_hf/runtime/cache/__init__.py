"""The compressed key-value and latent cache: encoding, storage, and attention that reads it tile by tile."""
