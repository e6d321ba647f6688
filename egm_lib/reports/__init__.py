"""What people look at: tables, figures, the gallery, the numbers in the README."""
