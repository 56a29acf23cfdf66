"""Start blip2/programs/build_vit_qformer.py: build TensorRT plans."""

from blip2.programs.build_vit_qformer import program

if __name__ == "__main__":
    program()
