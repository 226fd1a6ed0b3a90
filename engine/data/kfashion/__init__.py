"""The K-Fashion data set: labels, captions, colours and garment classes. The only package that knows of clothes."""
