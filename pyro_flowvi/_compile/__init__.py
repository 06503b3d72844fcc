"""The compiler: Pyro's gradient step as a graph, run as machine code or operation by operation."""
