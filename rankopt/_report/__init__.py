"""What people see: tables in the terminal, figures and reports as pages."""
