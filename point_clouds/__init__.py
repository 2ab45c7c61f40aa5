"""Point clouds: classification by P2P with an image backbone; nothing outside imports it."""
