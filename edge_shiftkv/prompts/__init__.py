"""From messages and pictures to the tokens of a prompt."""
