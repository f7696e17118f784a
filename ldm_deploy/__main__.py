"""`python -m ldm_deploy` is `ldm-deploy`."""

from ldm_deploy.cli import main

if __name__ == "__main__":
    main()
