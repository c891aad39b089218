"""Generated tasks: each makes examples of a wanted length and names the metric that scores them."""
