"""How the loops of others call us. Each module here knows one of them; none imports it."""
