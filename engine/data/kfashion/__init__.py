"""The K-Fashion data set: labels, captions, colours. engine.data.formats and the commands are its only users."""
