"""Small real jobs with their data pipelines, and the loops and frameworks that train them."""
