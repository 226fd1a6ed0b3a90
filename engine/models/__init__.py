"""The networks, their vocabularies, and the model folder that holds their weights."""
