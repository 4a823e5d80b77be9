"""How images get their labels: optimal transport, k-means, and the memories these look at."""
