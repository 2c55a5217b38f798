"""Parts that every HTML page is made of."""
