"""What an algorithm would do with given groups: the code of training, every number kept."""
