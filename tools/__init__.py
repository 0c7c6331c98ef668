"""Tools of the developers: none is part of the package."""
