"""The programs: arguments in, files and lines out. The scripts of the same names start them."""
