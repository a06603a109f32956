"""What training minimises, piece by piece, behind one small interface."""
