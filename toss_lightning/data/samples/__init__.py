"""Small invented sample sets, and the script that makes them."""
