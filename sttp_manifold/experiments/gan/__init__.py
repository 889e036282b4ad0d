"""Parts of GAN training: settings, images, the classifier of the metrics, entrants, distances."""
