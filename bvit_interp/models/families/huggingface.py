"""The blocks of Hugging Face's vision transformers: `transformers`, version 5."""
