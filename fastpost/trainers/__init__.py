"""Drop-in trainers, one file per method. `seam` is what they share."""
