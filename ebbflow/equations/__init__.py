"""Systems of equations, of which nothing here knows where they come from."""
