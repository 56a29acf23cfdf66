"""Start blip2/programs/onnx_export.py: export the ViT and the Q-Former to ONNX."""

from blip2.programs.onnx_export import program

if __name__ == "__main__":
    program()
