"""What EK-FAC's answers are judged by: rival methods and slower, more exact ones. They use the engine; it never uses them."""
