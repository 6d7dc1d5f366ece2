"""How fast is each variant? One clock and one policy for all of them."""
