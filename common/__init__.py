"""What the scripts share. Nothing that a paper claims or tunes lives here."""
