"""`python -m scripts.studies.findings`."""

from scripts.studies.findings.command import main

if __name__ == "__main__":
    main()
