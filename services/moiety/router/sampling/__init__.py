"""From logits to tokens: penalties, guides, the draw, and log probabilities."""
