"""Labels for any folder of images from a trained network: one pass, kept in files, then clusters and neighbours."""
