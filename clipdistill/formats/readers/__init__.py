"""Scripts that load an export with its consumer's own library, each run in a process of its own.

They import nothing of this package: what they show is what any user of the library gets. Called with the export's
folder, a file of probes, the file to write, and the precision.
"""
