"""Pictures of what is inside a network: its filters, what they answer to, where it looks."""
