"""Start blip2/programs/run.py: ask BLIP-2 about a picture, or about many."""

from blip2.programs.run import program

if __name__ == "__main__":
    program()
