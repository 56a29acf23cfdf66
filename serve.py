"""Start blip2/programs/serve.py: BLIP-2 over HTTP, and a page to ask on."""

from blip2.programs.serve import program

if __name__ == "__main__":
    program()
