"""From a folder of captioned images and this machine to the configs of three trainings."""
