"""What each method learns, behind one small protocol."""
