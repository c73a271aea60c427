"""QK-Clip: attention logits are kept in bounds by scaling the weights of queries and keys after the step."""
