"""What bench.real does: every claim of the README, confirmed or refuted on the published checkpoint.

source      the checkpoint: a directory, or the hub's, whose files are compared with its hashes
needs       disk, memory and minutes, before anything is downloaded
pictures    what is asked about
reference   a program: transformers' answers        answers     a program: this suite's
steps       commands, and the journal of those that are done
claims      pass or fail                            report      one Markdown file
"""

PRECISIONS = ("float16", "int8", "int4")  # of OPT
