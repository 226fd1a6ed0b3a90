"""A package, so that its browser and server live as long as its tests and no longer (fixtures of scope "package")."""
