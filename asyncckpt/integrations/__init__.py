"""What is known of one framework alone. Nothing else imports these rooms, and they import it when used."""
