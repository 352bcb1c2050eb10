from vitx.cli import main

main()
