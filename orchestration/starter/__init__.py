"""The starter world: arithmetic, its data, its tokenizer and its base model."""
